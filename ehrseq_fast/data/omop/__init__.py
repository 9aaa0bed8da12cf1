"""Read patient records from an OMOP Common Data Model in DuckDB."""

from .read import read_omop

__all__ = ["read_omop"]
