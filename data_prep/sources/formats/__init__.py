"""What the files of a corpus look like: a module for each kind, which yields its documents."""
