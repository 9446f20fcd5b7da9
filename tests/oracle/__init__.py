"""A second trainer that shares no code with this project, to hold its losses against."""
