"""``ehrseq-fast predict RUN STORE OUT.parquet``: scores of every visit."""

from __future__ import annotations

import argparse
from typing import Any

from ..optional import need


def add(commands: Any) -> None:
    """Add the command to ``argparse``'s sub-parsers."""
    parser = commands.add_parser("predict", help="score every visit, to a parquet file")
    parser.add_argument("trained", metavar="RUN", help="folder of a run that has ended")
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument("out", metavar="OUT.parquet", help="the file to write")
    parser.add_argument("--split", help="whose visits; all patients' without it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.parquet")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    need("safetensors", "train", "ehrseq-fast predict")
    need("pyarrow", "meds", "ehrseq-fast predict")
    from ..training import predict

    predict(
        arguments.trained,
        arguments.store,
        arguments.out,
        split=arguments.split,
        device=arguments.device,
        overwrite=arguments.overwrite,
        progress=True,
    )
    return 0
