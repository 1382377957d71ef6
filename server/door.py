"""The gate as what comes from a Hub meets it: the ordinary check-in, card and picture."""

import json
from dataclasses import dataclass

from registry.blobs import Upload
from registry.catalog import Catalog
from registry.digests import DigestStream
from registry.hub.exchange import Arrival
from registry.records import Version
from server.checkin import Declared, check_in, facts_with
from server.convert import caption as plain
from server.previews import redrawn


@dataclass(frozen=True, slots=True)
class Gate:
    """The door of one catalog (`registry.hub.exchange.Door`)."""

    catalog: Catalog

    def check_in(self, upload: Upload, digests: DigestStream, arrival: Arrival, actor: str) -> Version:
        """Raises RegistryError, ComposeError."""
        declared = Declared(
            name=arrival.name,
            base=arrival.base,
            card=arrival.card,
            alias=arrival.alias,
            file_name=arrival.file_name,
            adapter_config=arrival.adapter_config,
            actor=actor,
            origin=json.dumps(dict(arrival.origin)),
            commit=arrival.commit,
            seen=arrival.seen,
            first=arrival.first,
        )
        return check_in(self.catalog, upload, declared, digests)[0]

    def set_card(self, version: Version, card: bytes, actor: str, *, newest: bool = False) -> Version:
        """Raises InvalidFile, NotFound, Conflict, Moved."""
        facts = facts_with(self.catalog, version, card)
        seen = version if newest else None
        return self.catalog.set_card(
            version.ref, card, facts, expected=version.card_digest, seen=seen, actor=actor
        )[0]  # fmt: skip

    def add_preview(self, version: Version, image: bytes, caption: str, actor: str) -> str:
        """Raises InvalidFile, NotFound, Conflict."""
        png, width, height = redrawn(image)
        with self.catalog.blobs.upload() as upload:
            upload.write(png)
            _, shown = self.catalog.add_preview(
                version.ref, upload, width=width, height=height, caption=plain(caption), actor=actor
            )
        return shown.digest
