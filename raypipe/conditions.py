"""SQL conditions (`--where`) over Arrow tables, by DuckDB, which gets at nothing but the tables it is given."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa


class Condition:
    """One condition that each row of a table answers alone."""

    def __init__(self, where: str, columns: Sequence[str]):
        """columns: what it can name, for errors. Raises ValueError for a text that is not one condition by itself."""
        import duckdb

        if not where.strip():
            raise ValueError("--where: expected a condition, got an empty text")
        self.database = duckdb.connect(config={"enable_external_access": "false"})
        self._where, self._columns = where, columns
        with self.explained():
            self._check_form()

    def matches(self, table: pa.Table) -> list[bool]:
        """Which rows of a table fulfil it; where it is unknown (NULL) they do not. Raises ValueError."""
        self.database.register("given", table.append_column("row number", pa.array(range(len(table)), pa.int64())))
        query = f'SELECT coalesce((\n{self._where}\n), false) FROM given ORDER BY "row number"'
        with self.explained():
            return [bool(answer) for (answer,) in self.database.execute(query).fetchall()]

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What DuckDB says of the condition as a ValueError with the columns there are."""
        import duckdb

        try:
            yield
        except (duckdb.Error, ValueError) as error:
            reason = str(error).partition("\n")[0]
            unknown = re.search(r'column "(.+)" not found', reason)
            text = unknown[1].strip("\"'“”‘’") if unknown else ""
            if text and re.search(rf"(=|<>|\b(like|in)\b)\W*{re.escape(text)}", self._where, re.IGNORECASE):
                reason += f" text stands in single quotes, '{text}'"
            where, columns = f"--where {self._where!r}", ", ".join(self._columns)
            raise ValueError(f"{where}: {reason}; the columns are {columns}") from None

    def _check_form(self) -> None:
        query = f"SELECT 1 FROM one_batch WHERE\n{self._where}\n"
        parsed = json.loads(self.database.execute("SELECT json_serialize_sql(?)", [query]).fetchall()[0][0])
        if parsed["error"]:
            raise ValueError(parsed["error_message"])
        if len(parsed["statements"]) != 1:
            raise ValueError("expected one condition, got several statements")
        if '"class": "SUBQUERY"' in json.dumps(parsed):  # it would see some rows at a time
            raise ValueError("a condition cannot hold a query")
