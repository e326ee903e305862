"""Results of a run: its figures and export, pictures, the report page and console summaries."""
