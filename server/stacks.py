"""References with weights -> pinned versions -> factors and words, ready to apply or to bake.

Whatever is pinned is named by version and digest, so that what is rendered or baked now can be made again
when an alias has moved (`server.pinned`); what adapters hold is read once (`server.shelf`), what was merged
is kept for a while (`server.merges`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from compose.bases import Base
from compose.checkpoint import Checkpoint
from compose.difference import Change, differences
from compose.errors import IncompatibleBase, InvalidRequest
from compose.families import families
from compose.formats.export import diffusers_parts, to_diffusers, to_kohya, to_peft
from compose.formats.sketch import RANK_LIMIT
from compose.groups import Adapter, nobody_asks
from compose.layerwise import Stack
from compose.ledger import Ledger
from compose.merging import Merged, check
from compose.methods import METHODS, Parameters
from compose.projection import projection
from compose.schedule import MODES, Phase, Plan, Schedule
from compose.warm import alone
from compose.weights import AS_TRAINED, Weight
from compose.words import Word
from registry.about import strictest
from registry.catalog import Catalog
from registry.digests import digests
from registry.errors import NotFound
from registry.headers import read_header
from registry.nearest import Projection
from registry.records import Version
from registry.triggers import is_word
from server.calibrations import Calibrations
from server.checkin import LORA, STACK, TEXTUAL_INVERSION, changes
from server.layered import comparable, layered, left_out, mergeable
from server.merges import Merges, key_of
from server.pinned import Pinned, content_of, is_dora, order, recipe
from server.shelf import CACHE_BYTES, Check, Shelf
from server.telemetry import Cache

EXPORTS = ("diffusers", "kohya", "peft")


@dataclass(frozen=True, slots=True)
class Composition:
    """A stack in the form the pipeline takes: what is applied, words, a key equal for equal weights, and when
    each of what is applied acts (() for always).
    """

    stack: Stack
    words: tuple[Word, ...]
    key: object
    schedules: tuple[Schedule, ...] = ()


class Stacks:
    """Resolves, loads, composes and bakes stacks. Safe to use from several threads."""

    def __init__(
        self,
        catalog: Catalog,
        calibrations: Calibrations,
        *,
        device: str = "cpu",
        adapter_bytes: int = CACHE_BYTES,
        ledger: Ledger | None = None,
    ) -> None:
        self._catalog, self._calibrations = catalog, calibrations
        self._device = device
        self.shelf = self._shelf = Shelf(catalog, device=device, capacity=adapter_bytes, ledger=ledger)
        self.merges = Merges(self._shelf, calibrations, device=device, ledger=ledger)

    @property
    def caches(self) -> tuple[Cache, ...]:
        """How often what was wanted was there."""
        return self._shelf.cache, *self.merges.caches

    def pin(
        self,
        refs: Sequence[tuple[str, Weight]],
        *,
        method: str,
        parameters: Parameters,
        bare: bool = False,
        schedules: Sequence[Schedule] = (),
        base: str = "",
    ) -> tuple[Pinned, ...]:
        """The versions the references name now, a saved stack's members in its place; `bare` allows none.
        `schedules` are one for each reference, or none; `base` is where a method that needs calibrations
        takes them from, "" the first that the stack fits.

        Raises InvalidRequest, InvalidName, NotFound before any tensor is read.
        """
        modes = MODES if bare else {}
        if refs or not bare or method != "naive":
            check([weight for _, weight in refs], method, parameters, modes=modes)
        pinned = []
        for place, (ref, weight) in enumerate(refs):
            schedule = schedules[place] if schedules else ()
            version = self._catalog.resolve(ref)
            if ref.startswith("sha256:"):
                same = self._catalog.with_digest(ref)
                if len(set(map(content_of, same))) > 1:
                    raise InvalidRequest(
                        f"{', '.join(other.ref for other in same)} hold these bytes with different "
                        "adapter_config.json; name one of them",
                        field="stack.ref",
                    )
            if version.kind == STACK:
                if weight.parts:
                    raise InvalidRequest(
                        f"{version.ref} is a saved stack: give its members weights by part, not the whole",
                        field="stack.parts",
                    )
                members = version.facts["stack"]["members"]
                for member in self.repin(members, method="naive", parameters=Parameters()):
                    scaled = member.weight.scaled(weight.value)
                    pinned.append(replace(member, weight=scaled, via=version, schedule=schedule))
                continue
            if version.kind == TEXTUAL_INVERSION and weight.parts:
                raise InvalidRequest(
                    f"{version.ref} is a textual inversion: it has words and no parts; give it one weight",
                    field="stack.parts",
                )
            if version.kind == TEXTUAL_INVERSION and schedule:
                raise InvalidRequest(
                    f"{version.ref} is a textual inversion: its words are read before the first step; "
                    "leave its schedule out",
                    field="schedules",
                )
            groups: dict[str, tuple[str, ...]] = {}
            for trigger in version.facts.get("triggers", ()):
                group = trigger.get("group", "")
                groups[group] = (*groups.get(group, ()), trigger["word"])
            pinned.append(Pinned(version, weight, groups.pop("", ()), groups, schedule=schedule))
        pinned = self.measured(pinned, method, base)
        if any(p.via for p in pinned):  # there are more of them now, and their weights are products
            check([p.weight for p in pinned], method, parameters, modes=modes)
        return tuple(pinned)

    def repin(
        self,
        entries: Sequence[Mapping[str, Any]],
        *,
        method: str,
        parameters: Parameters,
        bare: bool = False,
        base: str = "",
    ) -> tuple[Pinned, ...]:
        """The stack of a manifest, by content; names matter only where several versions have it.

        Raises InvalidRequest, NotFound.
        """
        weights = [Weight.of_parts(float(e["weight"]), e.get("parts", {})) for e in entries]
        if entries or method != "naive":
            check(weights, method, parameters, modes=MODES if bare else {})
        pinned = []
        for entry, weight in zip(entries, weights, strict=True):
            wanted = (entry["digest"], entry["adapter_config"])
            known = [v for v in self._catalog.with_digest(entry["digest"]) if content_of(v) == wanted]
            if not known:
                raise NotFound(
                    f"{entry['ref']} ({entry['digest']}) is not in the catalog: check it in, or undelete it",
                    field="stack",
                )
            groups = {str(name): tuple(words) for name, words in entry.get("groups", {}).items()}
            told = [word for words in (entry["words"], *groups.values()) for word in words]
            if not all(isinstance(word, str) and is_word(word) for word in told):
                raise InvalidRequest(
                    f"a word of {entry['ref']} in the manifest is none", field="manifest_json"
                )
            version = next((v for v in known if v.ref == entry["ref"]), known[0])
            schedule = tuple(Phase(*phase) for phase in entry.get("phases", ()))
            Plan((schedule,)).check(1)
            moments = str(entry.get("moments", ""))
            pinned.append(
                Pinned(version, weight, tuple(entry["words"]), groups, moments=moments, schedule=schedule)
            )
        return tuple(self.measured(pinned, method, base))

    def measured(self, stack: Sequence[Pinned], method: str, base: str = "") -> list[Pinned]:
        """A stack with its calibrations, for the methods that need them: those that it names already where
        they are still here, else those on the base of that name, or on the first that the stack fits. Raises
        BadRequest, IncompatibleBase when there are none.
        """
        if method in MODES or not METHODS[method].calibrated:
            return [replace(pinned, moments="") for pinned in stack]
        on = self._calibrations.served.under([p for p in stack if p.version.kind == LORA], base)
        found = []
        for pinned in stack:
            if pinned.version.kind != LORA or (
                pinned.moments and self._calibrations.kept(pinned.version, pinned.moments)
            ):
                found.append(pinned)
                continue
            if not pinned.weight.value:  # as if it were not in the stack
                found.append(replace(pinned, moments=""))
                continue
            calibration = self._calibrations.of(pinned.version, on)
            if calibration is None:
                raise IncompatibleBase(
                    f"{method!r} needs measured activations, and {pinned.version.ref} has none on {on.name}: "
                    f"atelier calibrate {pinned.version.ref}{self._calibrations.served.option(on)}",
                    field="stack",
                )
            found.append(replace(pinned, moments=calibration.digest))
        return found

    def check_there(self, stack: Sequence[Pinned]) -> None:
        """Raises NotFound for a version that was deleted since it was pinned."""
        for pinned in stack:
            self._catalog.resolve(pinned.version.ref)

    def key(self, stack: Sequence[Pinned], family: str, *, method: str, parameters: Parameters) -> object:
        """The key of a stack's composition, before any tensor is read."""
        loras = applied(stack, method)
        told = (method, parameters) if merges(method) else ("", Parameters())
        return key_of(loras, family, *told) if loras else ("", family)

    def compose(
        self,
        stack: Sequence[Pinned],
        family: str,
        *,
        method: str,
        parameters: Parameters,
        check: Check = nobody_asks,
    ) -> Composition:
        """What a stack is on a base of `family`: every adapter by itself, or with a method that merges the
        merge. What `check` raises, called between adapters and between batches of layers, ends it. Raises
        IncompatibleBase, InvalidRequest, NonFinite, Damaged.
        """
        loras = applied(stack, method)
        words = tuple(word for p in stack for word in self._shelf.words(p, family))
        key = self.key(stack, family, method=method, parameters=parameters)
        if not loras:
            return Composition((), words, key)
        if merges(method):
            merged = self.merges.merge(loras, family, method, parameters, check)
            return Composition(alone(merged.layers), words, key)
        layers = [self._shelf.layers(p, family, check) for p in loras]
        for pinned, found in zip(loras, layers, strict=True):
            pinned.weight.check_parts(found, what=pinned.version.ref)
        schedules = tuple(p.schedule for p in loras)
        weighted = tuple((found, p.weight) for p, found in zip(loras, layers, strict=True))
        return Composition(weighted, words, key, schedules if any(schedules) else ())

    def compose_measured(
        self,
        stack: Sequence[Pinned],
        base: Base,
        *,
        method: str,
        parameters: Parameters,
        check: Check = nobody_asks,
    ) -> Composition:
        """`compose` for a stack that was pinned for another method. Raises IncompatibleBase."""
        measured = self.measured(stack, method, base.name)
        return self.compose(measured, base.family, method=method, parameters=parameters, check=check)

    def bake(
        self,
        stack: Sequence[Pinned],
        *,
        method: str,
        parameters: Parameters,
        name: str,
        alias: str = "",
        check_wanted: Check = nobody_asks,
        actor: str = "",
        report: Mapping[str, Any] | None = None,
    ) -> tuple[Version, bool, Merged]:
        """Merges a stack into a new version of `name`, with its recipe; `check_wanted` may raise between
        batches of layers, and before it is kept.

        Raises IncompatibleBase, InvalidRequest, Conflict.
        """
        family = mergeable(stack)
        merged = self._baked(stack, family, method, parameters, check_wanted)
        if (rank := max(factors.rank for factors in merged.layers.values())) > RANK_LIMIT:
            raise InvalidRequest(
                f"the merge has rank {rank}, and a file's limit is {RANK_LIMIT}: ask for a smaller one "
                "(--method svd --rank 256), or keep the stack as it is (atelier stack)",
                field="method.rank",
            )
        check_wanted()
        made = recipe(stack, method, parameters)
        with self._catalog.blobs.upload() as upload:
            for part in diffusers_parts(merged.layers, family):
                upload.write(part)
            upload.finish()
            version, created = self._catalog.add(
                upload,
                name=name,
                kind=LORA,
                facts=_facts(stack, merged, family) | {"declared": {"recipe": made}},
                recipe=made
                | {
                    "kept": list(merged.kept),
                    "truncation_error": merged.truncation_error,
                    "made_with": self._made_with(),
                    **(report or {}),
                },
                alias=alias,
                digests=digests(upload.path, read_header(upload.path)),
                projection=Projection(f"{LORA}/{family}", projection(merged.layers)),
                actor=actor,
            )
        return version, created, merged

    def _baked(
        self, stack: Sequence[Pinned], family: str, method: str, parameters: Parameters, check: Check
    ) -> Merged:
        """The merge of a stack of LoRAs, what was kept of each in the stack's order."""
        members = applied(stack, method)
        merged = self.merges.merge(members, family, method, parameters, check)
        kept = {id(p): share for p, share in zip(members, merged.kept, strict=True)}
        return replace(merged, kept=tuple(kept[id(p)] for p in stack))

    def remake(self, ref: str, check_wanted: Check = nobody_asks) -> tuple[Version, str, list[str]]:
        """A merged version, the digest of the same merge made now, and what may make it another;
        `check_wanted` as in `bake`. Raises RegistryError, ComposeError.
        """
        version = self._catalog.resolve(ref)
        if not version.recipe:
            raise InvalidRequest(f"{version.ref} was not made by a merge: it has no recipe", field="ref")
        recipe = version.recipe
        method, parameters = recipe["method"], Parameters(**recipe["parameters"])
        stack = self.repin(recipe["parents"], method=method, parameters=parameters)
        family = mergeable(stack)
        made = hashlib.sha256()
        baked = self._baked(stack, family, method, parameters, check_wanted)
        for part in diffusers_parts(baked.layers, family):
            made.update(part)
        here = self._made_with()
        was = recipe.get("made_with", {})
        differences = [
            f"{name} was {was[name]}, here it is {value}"
            for name, value in here.items()
            if was.get(name, value) != value
        ]
        differences += [
            f"{p.version.ref} was calibrated otherwise"
            for p, entry in zip(stack, recipe["parents"], strict=True)
            if p.moments != entry.get("moments", "")
        ]
        return version, f"sha256:{made.hexdigest()}", differences

    def _made_with(self) -> dict[str, Any]:
        """What else the bytes of a merge may depend on: on a CPU sums are split among the threads."""
        threads = {"threads": torch.get_num_threads()} if self._device == "cpu" else {}
        return {"torch": torch.__version__, "device": self._device, **threads}

    def weighed(
        self, stack: Sequence[Pinned], base: str = "", check: Check = nobody_asks
    ) -> tuple[Base | None, list[Adapter]]:
        """The base that a stack of LoRAs is looked at on, the first that it fits for "", None where there is
        none; and its adapters with whatever was measured of them there. What `check` raises as they are read
        ends it. Raises BadRequest, InvalidRequest, IncompatibleBase.
        """
        family, served = comparable(stack), self._calibrations.served
        on = served.under(stack, base) if base else served.of_family(family)
        adapters = []
        for pinned in stack:
            layers = self._shelf.layers(pinned, family, check)
            pinned.weight.check_parts(layers, what=pinned.version.ref)
            found = self._calibrations.of(pinned.version, on) if on else None
            adapters.append(Adapter(layers, pinned.weight, found.moments if found else {}))
        return on, adapters

    def export(self, ref: str, layout: str) -> tuple[dict[str, bytes], tuple[str, ...]]:
        """A LoRA's files in the layout of another program, by name, and what of it is in no layer, and so in
        none of them. Raises RegistryError, ComposeError.
        """
        if layout not in EXPORTS:
            raise InvalidRequest(f"unknown format {layout!r}; there are {', '.join(EXPORTS)}", field="format")
        stack = self.pin([(ref, AS_TRAINED)], method="naive", parameters=Parameters())
        if len(stack) != 1:
            raise InvalidRequest(f"{ref} is a saved stack; merge it first, then export that", field="ref")
        family, version = layered(stack), stack[0].version
        layers = self._shelf.layers(stack[0], family)
        match layout:
            case "peft":
                files = {
                    f"{component}/{name}": data
                    for component, found in to_peft(layers, family).items()
                    for name, data in (
                        ("adapter_model.safetensors", found.weights),
                        ("adapter_config.json", found.config.encode()),
                    )
                }
            case "kohya":
                files = {f"{version.name}.safetensors": to_kohya(layers, family)}
            case _:
                files = {f"{version.name}.safetensors": to_diffusers(layers, family)}
        return files, left_out(version)

    def compare(self, before: str, after: str) -> tuple[Version, Version, list[Change]]:
        """How far two LoRAs are apart. Raises RegistryError, ComposeError."""
        pair = self.pin([(before, Weight()), (after, Weight())], method="naive", parameters=Parameters())
        if len(pair) != 2 or any(p.version.kind != LORA for p in pair):
            raise InvalidRequest("only two LoRAs have layers to compare", field="after")
        family = next((family for p in pair if (family := p.version.facts["family"])), "")
        if family not in families():
            raise IncompatibleBase(
                f"the layers of {family or 'their base'} are not known here", field="before"
            )
        one, other = (self._shelf.layers(p, family) for p in pair)
        if not (dora := next((p for p in pair if is_dora(p)), None)):
            return pair[0].version, pair[1].version, differences(one, other)
        base = self._calibrations.served.of_family(family)
        if base is None:
            raise IncompatibleBase(
                f"{dora.version.ref} is a DoRA: what it adds depends on a base of {family}, and none is "
                "served here; serve one (atelier serve --base)",
                field="after" if dora is pair[1] else "before",
            )
        with ExitStack() as opened:
            golden = Checkpoint(base.path, opened).golden
            return pair[0].version, pair[1].version, differences(one, other, golden=golden)


def merges(method: str) -> bool:
    """Whether its stacks are merged before they are applied."""
    return method != "naive" and method not in MODES


def applied(stack: Sequence[Pinned], method: str) -> list[Pinned]:
    """The LoRAs of a stack in the order in which they are applied: sorted where it means nothing, so that A +
    B is B + A to the bit.
    """
    loras = [p for p in stack if p.version.kind == LORA]
    return loras if {**METHODS, **MODES}[method].ordered else sorted(loras, key=order)


def _facts(stack: Sequence[Pinned], merged: Merged, family: str) -> dict[str, Any]:
    words = dict.fromkeys(word for p in stack for word in p.triggers)
    told = [p.version.facts.get("about", {}).get("licence", {}) for p in stack]
    licences = [licence.get("value", "") for licence in told]
    layers = len(merged.layers)
    return {
        "family": family,
        "layout": "diffusers",
        "rank": max(factors.rank for factors in merged.layers.values()),
        **changes(merged.layers),
        "coverage": {"base": family, "bound": layers, "total": layers, "unbound": []},
        "triggers": [{"word": word, "source": "recipe"} for word in words],
        "about": {"licence": {"value": strictest(licences), "source": "recipe"}},
        "file_name": "",
    }
