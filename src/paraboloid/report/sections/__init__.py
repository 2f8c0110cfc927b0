"""One file for each section of the page: its figures, tables and words, from that section of the record."""
