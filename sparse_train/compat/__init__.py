"""Private interfaces of the libraries that this package stands on, a file per library."""
