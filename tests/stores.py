"""New SQLite stores of MLflow's, faster: made once a process, and copied.

MLflow makes a store by replaying each change that its tables ever went through, in one or two seconds; some sixty tests
want a store of their own.
"""

import contextlib
import functools
import sqlite3
import sys
import tempfile
from collections.abc import Callable

import sqlalchemy
from sqlalchemy.engine import Engine

Make = Callable[[Engine], None]


def copy_new_stores() -> None:
    """Copy what MLflow has made once, in all tests of this process; to be called before it makes any."""
    from mlflow.store.db import utils

    makes: Make = utils._initialize_tables

    @functools.cache
    def made() -> sqlite3.Connection:
        kept = sqlite3.connect(":memory:", check_same_thread=False)
        with tempfile.TemporaryDirectory() as folder:
            engine = sqlalchemy.create_engine(f"sqlite:///{folder}/mlflow.db")
            makes(engine)
            engine.dispose()
            with contextlib.closing(sqlite3.connect(f"{folder}/mlflow.db")) as source:
                source.backup(kept)
        return kept

    def copies(engine: Engine) -> None:
        if engine.dialect.name != "sqlite" or not engine.url.database or sqlalchemy.inspect(engine).get_table_names():
            makes(engine)
            return
        with contextlib.closing(sqlite3.connect(engine.url.database)) as new:
            made().backup(new)

    for name, module in list(sys.modules.items()):
        if name.startswith("mlflow.") and getattr(module, "_initialize_tables", None) is makes:
            vars(module)["_initialize_tables"] = copies
