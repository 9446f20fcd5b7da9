"""Documents from files and folders, and the filters on them."""
