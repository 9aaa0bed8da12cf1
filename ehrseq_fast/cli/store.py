"""``ehrseq-fast store omop|meds|describe|to-meds``: records to a store, and out of one."""

from __future__ import annotations

import argparse
from typing import Any

from ..optional import need

_VISITS = "what makes a visit: {}, or a number of hours"


def add(commands: Any) -> None:
    """Add the command and its own commands to ``argparse``'s sub-parsers."""
    parser = commands.add_parser("store", help="make a store of records, describe or export one")
    of_store = parser.add_subparsers(dest="what", required=True)
    _add_omop(of_store)
    _add_meds(of_store)
    describe = of_store.add_parser("describe", help="what a store holds")
    describe.add_argument("store", metavar="STORE")
    describe.add_argument("--verify", action="store_true", help="compare all files' checksums")
    describe.set_defaults(run=_describe)
    export = of_store.add_parser("to-meds", help="write a store as a MEDS data set")
    export.add_argument("store", metavar="STORE")
    export.add_argument("folder", metavar="FOLDER")
    export.add_argument("--overwrite", action="store_true", help="replace FOLDER")
    export.set_defaults(run=_to_meds)


def _add_omop(commands: Any) -> None:
    parser = commands.add_parser("omop", help="from an OMOP database (a DuckDB file)")
    parser.add_argument("database", metavar="DATABASE")
    parser.add_argument("store", metavar="STORE", help="folder that is made")
    parser.add_argument("--schema", help="schema of the tables, with its catalogue if need be")
    parser.add_argument(
        "--tables",
        nargs="+",
        metavar="TABLE",
        help="which events: condition, drug, procedure, measurement, observation, device (all that "
        "the database has)",
    )
    parser.add_argument(
        "--visits",
        type=_visit_rule,
        default="day",
        help=_VISITS.format("day, time, visit_occurrence"),
    )
    parser.add_argument(
        "--outside-periods",
        choices=("leave_out", "keep"),
        help="events outside a person's observation periods (leave_out)",
    )
    parser.add_argument("--memory-limit", metavar="SIZE", help="of each process, such as 300MB")
    _add_common(parser)
    parser.set_defaults(run=_omop)


def _add_meds(commands: Any) -> None:
    parser = commands.add_parser("meds", help="from a folder of MEDS shards")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("store", metavar="STORE", help="folder that is made")
    parser.add_argument("--visits", type=_visit_rule, help=_VISITS.format("day, time, visit_id"))
    _add_common(parser)
    parser.set_defaults(run=_meds)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=1, help="processes that read (1)")
    parser.add_argument(
        "--min-count",
        type=int,
        help="least occurrences of a code in the training split to be known to models (1)",
    )
    parser.add_argument("--seed", type=int, help="of the split into training, tuning, held out (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace STORE")


def _visit_rule(text: str) -> str | float:
    try:
        hours = float(text)
    except ValueError:
        return text
    return int(hours) if hours.is_integer() else hours


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given; the reader has defaults for the others."""
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _omop(arguments: argparse.Namespace) -> int:
    need("duckdb", "omop", "ehrseq-fast store omop")
    from ..data import read_omop

    options = _given(arguments, "schema", "tables", "visits", "outside_periods", "memory_limit")
    options |= _given(arguments, "workers", "min_count", "seed")
    store = read_omop(arguments.database, arguments.store, overwrite=arguments.overwrite, **options)
    print(store.describe())
    return 0


def _meds(arguments: argparse.Namespace) -> int:
    need("pyarrow", "meds", "ehrseq-fast store meds")
    from ..data import read_meds

    options = _given(arguments, "visits", "workers", "min_count", "seed")
    store = read_meds(arguments.folder, arguments.store, overwrite=arguments.overwrite, **options)
    print(store.describe())
    return 0


def _describe(arguments: argparse.Namespace) -> int:
    from ..data import EventStore

    print(EventStore.open(arguments.store, verify=arguments.verify).describe())
    return 0


def _to_meds(arguments: argparse.Namespace) -> int:
    need("pyarrow", "meds", "ehrseq-fast store to-meds")
    from ..data import EventStore, to_meds

    to_meds(EventStore.open(arguments.store), arguments.folder, overwrite=arguments.overwrite)
    return 0
