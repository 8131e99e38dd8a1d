"""Search modes: one file per section of a sweep file that varies keys."""
