// Before anything is drawn: the reader's choice of light or dark, if they made one.
try {
  const chosen = localStorage.getItem("dx-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* storage is off: the system's choice holds */ }
