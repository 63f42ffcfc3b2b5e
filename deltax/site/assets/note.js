// One note: its state and its text, saved to the library and, if asked, to its file.
"use strict";
if (dx.token) {
  const id = document.querySelector(".entry").dataset.id;
  const [written, form, text, edit, state, read] = ["written", "form", "text", "edit", "state", "read"].map((name) => document.getElementById(name));

  async function save(wanted) {
    const file = document.getElementById("file");
    try {
      const found = await dx.send(`api/note/${id}`, { ...wanted, file: Boolean(file?.checked) });
      written.innerHTML = found.html; // made safe by the server: deltax/site/prose.py
      dx.math(written);
      text.value = found.text;
      state.value = found.state;
      read.hidden = found.state === "done";
      dx.say(found.warning || "Saved");
      return true;
    } catch (error) {
      dx.say(error.message);
      return false;
    }
  }
  function open(shown) {
    form.hidden = !shown;
    edit.hidden = shown;
    (shown ? text : edit).focus();
  }
  edit.addEventListener("click", () => open(true));
  document.getElementById("cancel").addEventListener("click", () => open(false));
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    if (event.key === "Escape") open(false);
  });
  form.addEventListener("submit", async () => { if (await save({ text: text.value })) open(false); });
  state.addEventListener("change", () => save({ state: state.value }));
  read.addEventListener("click", () => save({ state: "done" }));
}
