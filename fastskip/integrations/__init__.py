"""Plug-ins for other programs, one folder each; imported by those alone."""
