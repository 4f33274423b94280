"""IGPO inside other trainers, and other libraries' environments inside IGPO; each module needs that library's package."""
