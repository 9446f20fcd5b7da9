"""A run file and a site as the text of a batch file."""
