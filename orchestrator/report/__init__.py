"""Reports of results: tables, charts, pages and files for papers."""
