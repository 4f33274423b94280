"""IGPO inside other trainers, and environments of other libraries; each module needs its library's package."""
