"""Worker processes and progress of long jobs."""
