"""The report as one HTML page that needs no network: sections, tables and charts."""
