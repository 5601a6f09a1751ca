"""Layer 9: records in, tables out; opens no model."""
