"""The command line of `atelier serve`, without what it needs to serve: its help and its mistakes do not wait
for torch.
"""

import argparse
from pathlib import Path

from server import logs
from server.arguments import Parser


def parse() -> argparse.Namespace:
    """What the process was told; ends it for `--help`, and for what cannot be read."""
    parser = Parser(prog="atelier serve", description="Serve a catalog and a warm base over gRPC.")
    parser.add_argument("--data", type=Path, default=Path("atelier-data"), help="the catalog's directory")
    parser.add_argument("--listen", default="127.0.0.1:7431", help="HOST:PORT; port 0 takes a free one")
    parser.add_argument(
        "--tls-certificate", type=Path, metavar="FILE", help="PEM; answer encrypted, as grpcs://HOST:PORT"
    )
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM; the certificate's key")
    parser.add_argument(
        "--base",
        action="append",
        metavar="[NAME=]BASE",
        help="pocket, a directory with a diffusers pipeline, or hub:ORGANISATION/NAME; several times for "
        "several, the first is loaded at once",
    )
    parser.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="BASE:NAME=DIR[,MODE...]",
        help="a ControlNet for one of the bases, a diffusers directory; several times for several. MODE: "
        "what the modes of a union ControlNet are called, from 0 on, where it is not a published one; "
        "`inpaint` for one that paints where its picture is transparent",
    )
    parser.add_argument(
        "--ip-adapter",
        action="append",
        default=[],
        metavar="BASE:NAME=FILE[,ENCODER]",
        help="an IP-Adapter for one of the bases, with the directory of its image encoder, or one directory "
        "with both; several times for several",
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="for bases with their golden copies, adapters and merges together; what was used least recently "
        "is let go (default: 90%% of the device's)",
    )
    parser.add_argument(
        "--fp8",
        action="append",
        default=[],
        metavar="BASE",
        help="store the denoiser of this base in 8 bits a number; adapters are then computed beside its "
        "layers",
    )
    parser.add_argument(
        "--adapter-memory",
        type=float,
        default=2.0,
        metavar="GB",
        help="for adapters that are held (2)",
    )
    parser.add_argument(
        "--scorer",
        type=Path,
        metavar="DIR",
        help="a CLIP or SigLIP model of transformers that trial pictures of real bases are scored with",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="CPU threads for rendering; 0: all cores, with small bases all but one",
    )
    parser.add_argument(
        "--share",
        action="append",
        default=[],
        metavar="CLIENT=N",
        help="a client's share of the device while others wait, 1 when not said; several times for several",
    )
    parser.add_argument(
        "--keep-jobs", type=float, metavar="DAYS", help="that a job is kept after its end (7)"
    )
    parser.add_argument(
        "--hub",
        action="append",
        metavar="URL[,HOST]",
        help="a Hub that may be reached, with its storage; several times for several",
    )
    parser.add_argument("--offline", action="store_true", help="reach no Hub")
    parser.add_argument("--metrics", default="", help="HOST:PORT for Prometheus; nowhere when left out")
    parser.add_argument("--log-format", choices=logs.FORMATS, default="text", help="text, or JSON lines")
    parser.add_argument("--log-level", choices=logs.LEVELS, default="info", help="info: a line a call")
    parser.add_argument("--log-prompts", action="store_true", help="show in the log what was asked for")
    return parser.parse_args()
