"use strict";
const get = (id) => document.getElementById(id);

function element(tag, text, ...parts) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (parts.length) made.append(...parts);
  return made;
}

function factLine([name, value]) {
  const cell = element("td", value === null ? "-" : String(value));
  return element("tr", "", element("th", name.replaceAll("_", " ")), cell);
}

function onKeys(keys) {
  document.addEventListener("keydown", (event) => {
    const typing = ["INPUT", "SELECT"].includes(event.target.tagName);
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });
}
