"""FX helpers: re-tracing to ATen, row layouts, the row push-down engine, expert bodies."""
