"""What the command line runs: inspections, studies, training; imports from every room below."""
