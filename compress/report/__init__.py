"""One report model, and how it is written: JSON and the terminal."""
