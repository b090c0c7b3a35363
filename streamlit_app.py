"""The app: navigation, page set-up and the shared sidebar; each page is a short script in pages/."""

import streamlit as st

from core.view import session

page = session.navigation()
st.set_page_config(page_title=f"{page.title} · EM Microscope", page_icon="core/view/icon.svg", layout="wide")
session.note_slot()
session.sidebar()
page.run()
