"""What runs inside a job: the batch functions, one life, its ranks, and what follows its end."""
