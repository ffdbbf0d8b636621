"""The control plane of Lakebase: declared state in, plans out. See `docs/glossary.md` for its words."""
