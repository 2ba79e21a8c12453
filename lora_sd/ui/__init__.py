"""The app's pages. They and the trainer meet only in the run folder.

Nothing here may import gradio before `server.serve` has set its environment, and nothing imports
torch until a picture is asked for: the first page should not wait for it.
"""
