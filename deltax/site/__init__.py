"""The pages: the same HTML served on loopback and written as files. Loads no torch.

pages       what each page shows, as plain dicts
layout      where the papers of the genealogy stand
prose       a reader's Markdown as HTML that is safe to show
notes       the reader's notes, read once and changed on request; of a built site only the published ones
runs        comparisons, and what trains now
trees       what needs recipes (diffs, which deltas compose), asked of another process and cached
render      dicts -> HTML
build       the site as files
server      the site over HTTP, with what changes it
"""
