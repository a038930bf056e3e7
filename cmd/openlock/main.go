// Command openlock is the whole of openlock: the server, the tools of its
// operator, and a simulated lock.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v3"
)

// version of the product; see CHANGELOG.md.
const version = "0.1.0"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	err := run(ctx, os.Args, os.Stdout, os.Stderr)
	if err != nil {
		fmt.Fprintln(os.Stderr, "openlock:", err)
		os.Exit(1)
	}
}

// run is the program, without the process around it.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := &cli.Command{
		Name:           "openlock",
		Usage:          "a smart-lock cloud in one binary",
		Version:        version,
		Writer:         stdout,
		ErrWriter:      stderr,
		ExitErrHandler: func(context.Context, *cli.Command, error) {}, // main prints it, once
		ArgValidator:   surplus,
		Commands: []*cli.Command{
			serveCommand(), demoCommand(), organizationCommand(),
			credentialCommand("key", "API keys of organizations"),
			credentialCommand("client", "OAuth clients of organizations' own services"),
			tokenCommand(), userCommand(), deviceCommand(),
		},
	}
	_ = root.Walk(func(cmd *cli.Command) error { // it is not inherited
		cmd.OnUsageError = inOneLine
		return nil
	})
	return root.Run(ctx, args)
}

// surplus refuses what a command would ignore: a misspelt subcommand, or an
// argument where a flag was meant.
func surplus(_ context.Context, cmd *cli.Command) error {
	if cmd.ArgsUsage == "" && cmd.Args().Present() {
		return fmt.Errorf("unknown argument %q; see `%s --help`", cmd.Args().First(), cmd.FullName())
	}
	return nil
}

// inOneLine says what is wrong instead of showing all that would be right.
func inOneLine(_ context.Context, cmd *cli.Command, err error, _ bool) error {
	return fmt.Errorf("%w; see `%s --help`", err, cmd.FullName())
}

// dataFlag names the data folder.
func dataFlag() cli.Flag {
	return &cli.StringFlag{
		Name: "data", Value: "openlock-data", Usage: "`folder` that everything is kept in",
		Sources: cli.EnvVars("OPENLOCK_DATA"),
	}
}
