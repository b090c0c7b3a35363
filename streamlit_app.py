"""The app: navigation, page set-up and the shared sidebar; each page is a short script in pages/."""

import os

import streamlit as st

from core.view import session

# Threads that wait for each other must not spin: beside a browser that costs most of the speed. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

page = session.navigation()
st.set_page_config(page_title=f"{page.title} · EM Microscope", page_icon="core/view/icon.svg", layout="wide")
session.note_slot()
session.sidebar()
page.run()
