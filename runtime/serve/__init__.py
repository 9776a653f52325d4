"""`dgq serve`: OpenAI's HTTP interface over one loaded model. The requests' fields, the queue that makes batches of
them, the answers' objects, what keeps strangers out, and the page with the canvas.
"""
