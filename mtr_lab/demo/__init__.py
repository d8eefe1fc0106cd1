"""Two demonstrations: a page that Gradio serves, and one HTML file that runs exported models in the browser."""
