"""The papers' tables: their rows as runs, how these are started, what came out beside what was published."""
