"use strict";
// Light, dark or as the system says; remembered where the browser lets a file remember.
(() => {
  const button = document.getElementById("theme");
  const names = { auto: "as the system", light: "light", dark: "dark" };
  const recall = () => { try { return localStorage.getItem("chai-theme"); } catch { return null; } };
  const keep = (name) => { try { localStorage.setItem("chai-theme", name); } catch { /* not allowed */ } };
  const show = (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    button.textContent = `Theme: ${names[name]}`;
    button.dataset.name = name;
    document.dispatchEvent(new Event("themechange"));
  };
  button.addEventListener("click", () => {
    const order = Object.keys(names);
    const next = order[(order.indexOf(button.dataset.name) + 1) % order.length];
    keep(next);
    show(next);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("themechange")));
  const before = recall();
  show(before in names ? before : "auto");
  // paper cannot be unfolded
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
  button.hidden = false;
})();
