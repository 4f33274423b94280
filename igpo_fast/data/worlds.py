"""The made-up worlds by ``world.kind``: modules that have ``make_worlds``, ``vocabulary`` and ``demonstrate``."""

from igpo_fast.data import tables, world

WORLDS = {"knowledge": world, "tables": tables}
