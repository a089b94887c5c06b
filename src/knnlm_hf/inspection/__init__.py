"""A text, token by token: who predicted it, from where. One HTML page that needs nothing else.

reading.py    a text as the model and its memories read it: per token, and as a whole
pieces.py     decoded text, cut at its tokens
contexts.py   the table of the neighbours' texts, each entry once
page.py       the page of a reading, from page.html, page.css and page.js
"""

from knnlm_hf.inspection.page import explanation_page, render
from knnlm_hf.inspection.reading import Reading, read

__all__ = ["Reading", "explanation_page", "read", "render"]
