"""What a person sees: tables to charts, contexts to shaded text, labels. Only `session/` knows Streamlit."""
