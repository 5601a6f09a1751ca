"""Floor 6: records in, tables and pages out. Opens no model."""
