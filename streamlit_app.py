"""Navigation and the shared sidebar; each page is a short script in pages/."""

import streamlit as st

from core.view import session

st.set_page_config(page_title="EM Microscope", page_icon=":material/biotech:", layout="wide")
page = st.navigation([
    st.Page("pages/overview.py", title="Overview", icon=":material/home:", default=True),
    st.Page("pages/rankings.py", title="Rankings", icon=":material/leaderboard:"),
    st.Page("pages/feature.py", title="Feature", icon=":material/center_focus_strong:"),
])
session.sidebar()
session.show_notes()
page.run()
session.show_notes()
