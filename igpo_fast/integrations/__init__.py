"""IGPO inside other trainers; each module needs that trainer's package."""
