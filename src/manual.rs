//! `lazyvm man` and `lazyvm completions`, both made from the command line's own definition.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::exit::{Exit, Problem};

/// Flags of `man`.
#[derive(Args)]
pub struct ManArgs {
    /// The command whose page it is; without, lazyvm's own
    command: Option<String>,
    /// Write the pages of all commands into this directory instead
    #[arg(long, conflicts_with = "command")]
    dir: Option<PathBuf>,
}

/// Flags of `completions`.
#[derive(Args)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Prints or writes manual pages.
pub fn man(args: &ManArgs) -> anyhow::Result<Exit> {
    let mut lazyvm = Cli::command();
    if let Some(dir) = &args.dir {
        clap_mangen::generate_to(lazyvm, dir)
            .with_context(|| format!("can't write the manual pages to {}", dir.display()))?;
        return Ok(Exit::Done);
    }
    lazyvm.build();
    let page = match &args.command {
        None => lazyvm,
        Some(name) => lazyvm
            .get_subcommands()
            .find(|command| command.get_name() == name)
            .cloned()
            .ok_or_else(|| {
                Problem::new(
                    Exit::Usage,
                    format!("there is no command {name}; see lazyvm --help"),
                )
            })?,
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(page).render(&mut text)?;
    print(&text)
}

/// Prints completions.
pub fn completions(args: &CompletionsArgs) -> anyhow::Result<Exit> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "lazyvm", &mut text);
    print(&text)
}

fn print(text: &[u8]) -> anyhow::Result<Exit> {
    io::stdout().write_all(text).context("can't print")?;
    Ok(Exit::Done)
}
