"""Reading notes in, joined to the genealogy, searched, and out again. Loads no torch.

readers   Markdown in any of the shapes people keep notes in -> entries, and remarks on what was not understood
store     one SQLite file with full-text search; what the reader changes here is kept apart from what the file says
join      entries of one paper become one work, and find their paper in the catalogue
formats   BibTeX, CSL-JSON, RIS, CSV, Obsidian Markdown and the Δx table, out and back without loss
"""
