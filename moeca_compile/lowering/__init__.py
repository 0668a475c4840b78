"""From the `moeca::` dialect to a compiled callable."""
