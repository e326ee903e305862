"""Results of a run: metrics, pictures, the report page, console summaries and the comparison of runs."""
