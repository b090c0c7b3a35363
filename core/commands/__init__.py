"""The commands, a file for each group; core/__main__.py puts them together. Heavy imports stand inside functions."""
