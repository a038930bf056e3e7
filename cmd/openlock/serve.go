package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"syscall"
	"time"

	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/control"
	"github.com/urfave/cli/v3"
)

func serveCommand() *cli.Command {
	return &cli.Command{
		Name:  "serve",
		Usage: "run the server",
		Flags: []cli.Flag{
			dataFlag(),
			&cli.StringFlag{Name: "http", Value: "127.0.0.1:8787", Usage: "`address` of the API", Sources: cli.EnvVars("OPENLOCK_HTTP")},
			&cli.StringFlag{Name: "mqtt", Value: "127.0.0.1:8883", Usage: "`address` that devices connect to, with TLS", Sources: cli.EnvVars("OPENLOCK_MQTT")},
			&cli.StringFlag{Name: "tls-cert", Usage: "serve the API with TLS: certificate `file`, PEM", Sources: cli.EnvVars("OPENLOCK_TLS_CERT")},
			&cli.StringFlag{Name: "tls-key", Usage: "its key `file`, PEM", Sources: cli.EnvVars("OPENLOCK_TLS_KEY")},
			&cli.StringFlag{Name: "public-url", Usage: "`URL` under which the world reaches the API; issuer of its own tokens", Sources: cli.EnvVars("OPENLOCK_PUBLIC_URL")},
			&cli.StringSliceFlag{
				Name: "issuer", Usage: "trust tokens of an `issuer`: url=https://…,audience=…[,jwks=https://…][,org=…]; may be repeated",
				Sources: cli.EnvVars("OPENLOCK_ISSUER"), Config: cli.StringConfig{TrimSpace: true},
			},
		},
		Action: serve,
	}
}

func serve(ctx context.Context, cmd *cli.Command) error {
	cfg := config{
		data: cmd.String("data"), http: cmd.String("http"), mqtt: cmd.String("mqtt"),
		tlsCert: cmd.String("tls-cert"), tlsKey: cmd.String("tls-key"), publicURL: cmd.String("public-url"),
		settings: control.DefaultSettings, drain: 10 * time.Second,
		log: slog.New(slog.NewTextHandler(cmd.Root().ErrWriter, nil)),
	}
	if (cfg.tlsCert == "") != (cfg.tlsKey == "") {
		return fmt.Errorf("--tls-cert and --tls-key go together: give both or none")
	}
	for _, given := range cmd.StringSlice("issuer") {
		i, err := auth.ParseIssuer(given)
		if err != nil {
			return fmt.Errorf("--issuer: %w", err)
		}
		cfg.issuers = append(cfg.issuers, i)
	}
	s, err := start(context.WithoutCancel(ctx), cfg)
	if err != nil {
		return err
	}
	// A signal that has come or comes now stops the server in good order, like any later one.
	err = s.announce(context.WithoutCancel(ctx), cmd.Root().Writer)
	if err == nil {
		err = s.wait(ctx)
	}
	if err == nil {
		cfg.log.Info("stopping: requests under way are answered first")
	}
	if cerr := s.close(); err == nil {
		err = cerr
	}
	return err
}

// filesWanted is how many open files a server should be allowed.
const filesWanted = 4096

// announce says where everything is, and what is missing and how to get it.
func (s *server) announce(ctx context.Context, w io.Writer) error {
	data, err := filepath.Abs(s.path)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "openlock %s\n  API      %s\n  devices  mqtts://%s (client certificates, see `openlock device enroll`)\n  data     %s\n",
		version, s.url(), s.mqtt.Addr(), data)
	orgs, err := s.registry.Organizations(ctx)
	if err != nil {
		return err
	}
	if len(orgs) == 0 {
		fmt.Fprintf(w, "  missing  an organization: openlock org create acme --data %s\n           and its API key:  openlock key create --org acme --data %s\n", s.path, s.path)
	}
	if s.config.tlsCert == "" {
		fmt.Fprintf(w, "  missing  TLS for the API: give --tls-cert and --tls-key, or put a TLS proxy in front of it\n")
	}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err == nil && files.Cur < filesWanted {
		fmt.Fprintf(w, "  missing  open files: only %d are allowed, each device takes one; raise `ulimit -n`\n", files.Cur)
	}
	return nil
}
