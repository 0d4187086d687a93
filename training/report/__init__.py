"""The report of a run: its curves, its predictions on the held-out images, and the page that shows them."""
