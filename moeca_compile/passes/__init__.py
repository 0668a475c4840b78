"""The passes, one a file; `pipeline.py` holds their order, README.md the form after each stage."""
