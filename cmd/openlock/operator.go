package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/control"
	"github.com/openlock/openlock/internal/store"
	"github.com/urfave/cli/v3"
)

// inFolder runs a tool on a data folder, whether a server runs on it or not.
func inFolder(do func(ctx context.Context, cmd *cli.Command, f *folder, out io.Writer) error) cli.ActionFunc {
	return func(ctx context.Context, cmd *cli.Command) (err error) {
		f, err := openFolder(ctx, cmd.String("data"))
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.db.Close()) }()
		return told(do(ctx, cmd, f, cmd.Root().Writer))
	}
}

// told words the refusals that an operator meets.
func told(err error) error {
	switch {
	case errors.Is(err, store.ErrNoOrganization):
		return errors.New("there is no organization with this id; see `openlock org list`")
	case errors.Is(err, store.ErrExists):
		return errors.New("an organization with this id exists already")
	case errors.Is(err, store.ErrNotFound):
		return errors.New("there is no such credential in this organization, or it is revoked")
	}
	return err
}

// argument is the one argument of a command.
func argument(cmd *cli.Command, name string) (string, error) {
	if cmd.Args().Len() != 1 || cmd.Args().First() == "" {
		return "", fmt.Errorf("give one %s, after the flags; see `%s --help`", name, cmd.FullName())
	}
	return cmd.Args().First(), nil
}

func organizationCommand() *cli.Command {
	return &cli.Command{
		Name: "org", Usage: "organizations",
		Commands: []*cli.Command{
			{
				Name: "create", Usage: "make an organization", ArgsUsage: "ID",
				Flags:  []cli.Flag{dataFlag(), &cli.StringFlag{Name: "name", Usage: "what people call it"}},
				Action: inFolder(createOrganization),
			},
			{Name: "list", Usage: "list them", Flags: []cli.Flag{dataFlag()}, Action: inFolder(listOrganizations)},
			{
				Name: "open-expiry", Usage: "set how long an open of its locks lives", ArgsUsage: "ID",
				Flags:  []cli.Flag{dataFlag(), &cli.DurationFlag{Name: "after", Usage: "2s to 30s; 0 is the server's default, 10s", Required: true}},
				Action: inFolder(setOpenExpiry),
			},
		},
	}
}

func createOrganization(ctx context.Context, cmd *cli.Command, f *folder, out io.Writer) error {
	id, err := argument(cmd, "organization id")
	if err != nil {
		return err
	}
	o, err := f.registry.CreateOrganization(ctx, id, cmd.String("name"))
	if err == nil {
		fmt.Fprintf(out, "%s\n", o.ID)
	}
	return err
}

func setOpenExpiry(ctx context.Context, cmd *cli.Command, f *folder, out io.Writer) error {
	id, err := argument(cmd, "organization id")
	if err != nil {
		return err
	}
	return f.registry.SetOpenExpiry(ctx, id, cmd.Duration("after"))
}

func listOrganizations(ctx context.Context, _ *cli.Command, f *folder, out io.Writer) error {
	all, err := f.registry.Organizations(ctx)
	if err != nil {
		return err
	}
	return table(out, "ID\tNAME\tOPEN EXPIRY\tCREATED", func(line func(...any)) {
		for _, o := range all {
			line(o.ID, o.Name, cmp.Or(o.OpenExpiry, control.DefaultSettings.Expiry), day(o.CreatedAt))
		}
	})
}

// credentialCommand is the same for API keys and OAuth clients.
func credentialCommand(kind store.CredentialKind, usage string) *cli.Command {
	orgFlag := &cli.StringFlag{Name: "org", Usage: "`id` of the organization", Required: kind == store.Client}
	create := []cli.Flag{
		dataFlag(), orgFlag,
		&cli.StringFlag{Name: "name", Usage: "what it is for"},
		&cli.StringSliceFlag{Name: "scope", Usage: "`scope` it is given, may be repeated; all by default"},
		&cli.DurationFlag{Name: "expires", Usage: "it ends after this `time`, for example 720h; never by default"},
	}
	if kind == store.APIKey {
		create = append(create, &cli.BoolFlag{Name: "super", Usage: "a key of the operator, for every organization and the admin API"})
	}
	c := credentials{kind}
	return &cli.Command{
		Name: string(kind), Usage: usage,
		Commands: []*cli.Command{
			{Name: "create", Usage: "make one; its secret is shown this once", Flags: create, Action: inFolder(c.create)},
			{Name: "list", Usage: "list an organization's", Flags: []cli.Flag{dataFlag(), orgFlag}, Action: inFolder(c.list)},
			{
				Name: "rotate", Usage: "make a successor", ArgsUsage: "ID",
				Flags: []cli.Flag{
					dataFlag(), orgFlag,
					&cli.DurationFlag{Name: "overlap", Value: 24 * time.Hour, Usage: "the old one works for this `time` longer"},
				},
				Action: inFolder(c.rotate),
			},
			{Name: "revoke", Usage: "end one at once", ArgsUsage: "ID", Flags: []cli.Flag{dataFlag(), orgFlag}, Action: inFolder(c.revoke)},
		},
	}
}

type credentials struct{ kind store.CredentialKind }

// org is the organization of a command; the operator's own by default.
func org(cmd *cli.Command) string {
	if o := cmd.String("org"); o != "" {
		return o
	}
	return auth.OperatorOrg
}

func (k credentials) create(ctx context.Context, cmd *cli.Command, f *folder, out io.Writer) error {
	super := k.kind == store.APIKey && cmd.Bool("super")
	if super == (cmd.String("org") != "") {
		return errors.New("give --org for an organization's key or --super for the operator's, not both")
	}
	secret, c, err := f.registry.Create(ctx, auth.NewCredential{
		Kind: k.kind, Org: cmd.String("org"), Super: super, Name: cmd.String("name"),
		Scopes: cmd.StringSlice("scope"), Expires: cmd.Duration("expires"),
	})
	return k.show(out, secret, c, err)
}

func (k credentials) rotate(ctx context.Context, cmd *cli.Command, f *folder, out io.Writer) error {
	id, err := argument(cmd, "id")
	if err != nil {
		return err
	}
	secret, c, err := f.registry.Rotate(ctx, k.kind, org(cmd), id, cmd.Duration("overlap"))
	return k.show(out, secret, c, err)
}

// show prints the secret, alone on the last line so that scripts find it.
func (k credentials) show(out io.Writer, secret string, c store.Credential, err error) error {
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "id      %s\norg     %s\n", c.ID, c.Org)
	if len(c.Scopes) > 0 {
		fmt.Fprintf(out, "scopes  %s\n", strings.Join(c.Scopes, " "))
	}
	fmt.Fprintf(out, "The secret is shown this once:\n%s\n", secret)
	return nil
}

func (k credentials) revoke(ctx context.Context, cmd *cli.Command, f *folder, out io.Writer) error {
	id, err := argument(cmd, "id")
	if err != nil {
		return err
	}
	if err := f.registry.Revoke(ctx, k.kind, org(cmd), id); err != nil {
		return err
	}
	fmt.Fprintln(out, "revoked")
	return nil
}

func (k credentials) list(ctx context.Context, cmd *cli.Command, f *folder, out io.Writer) error {
	if o := cmd.String("org"); o != "" {
		if _, err := f.db.Organization(ctx, o); errors.Is(err, store.ErrNotFound) {
			return store.ErrNoOrganization
		} else if err != nil {
			return err
		}
	}
	all, err := f.registry.List(ctx, org(cmd), k.kind)
	if err != nil {
		return err
	}
	return table(out, "ID\tNAME\tSCOPES\tCREATED\tEXPIRES\tREVOKED\tLAST USED", func(line func(...any)) {
		for _, c := range all {
			line(c.ID, c.Name, strings.Join(c.Scopes, " "), day(c.CreatedAt), day(c.ExpiresAt), day(c.RevokedAt), day(c.UsedAt))
		}
	})
}

func tokenCommand() *cli.Command {
	return &cli.Command{
		Name: "token", Usage: "tokens of the built-in issuer",
		Commands: []*cli.Command{
			{
				Name: "user", Usage: "mint a user's token", ArgsUsage: "UUID",
				Flags: []cli.Flag{
					dataFlag(),
					&cli.DurationFlag{Name: "ttl", Value: time.Hour, Usage: "how long it lasts"},
					&cli.StringFlag{Name: "public-url", Usage: "issuer `URL`; by default that of the server in this folder", Sources: cli.EnvVars("OPENLOCK_PUBLIC_URL")},
				},
				Action: inFolder(mintToken),
			},
			{
				Name: "revoke", Usage: "make a token invalid", ArgsUsage: "JTI", Flags: []cli.Flag{dataFlag()},
				Action: inFolder(func(ctx context.Context, cmd *cli.Command, f *folder, out io.Writer) error {
					return named(ctx, cmd, out, "jti", "revoked", f.registry.RevokeToken)
				}),
			},
		},
	}
}

func mintToken(ctx context.Context, cmd *cli.Command, f *folder, out io.Writer) error {
	user, err := argument(cmd, "user, a UUID")
	if err != nil {
		return err
	}
	ttl := cmd.Duration("ttl")
	if ttl < time.Second {
		return fmt.Errorf("--ttl is %s: a token lasts a second at least", ttl)
	}
	builtin, err := f.builtin(ctx, cmd.String("public-url"), "http://127.0.0.1:8787")
	if err != nil {
		return err
	}
	token, _, err := builtin.User(user, ttl, f.clock.Wall())
	if err == nil {
		fmt.Fprintln(out, token)
	}
	return err
}

func userCommand() *cli.Command {
	return &cli.Command{
		Name: "user", Usage: "users, who are named by the tokens' sub",
		Commands: []*cli.Command{
			{
				Name: "suspend", Usage: "make all tokens of a user invalid", ArgsUsage: "UUID", Flags: []cli.Flag{dataFlag()},
				Action: inFolder(func(ctx context.Context, cmd *cli.Command, f *folder, out io.Writer) error {
					return named(ctx, cmd, out, "user", "suspended", f.registry.SuspendUser)
				}),
			},
			{
				Name: "reactivate", Usage: "end a suspension", ArgsUsage: "UUID", Flags: []cli.Flag{dataFlag()},
				Action: inFolder(func(ctx context.Context, cmd *cli.Command, f *folder, out io.Writer) error {
					return named(ctx, cmd, out, "user", "reactivated", f.registry.ReactivateUser)
				}),
			},
		},
	}
}

// named runs what needs nothing but one name.
func named(ctx context.Context, cmd *cli.Command, out io.Writer, what, done string, do func(context.Context, string) error) error {
	name, err := argument(cmd, what)
	if err != nil {
		return err
	}
	if err := do(ctx, name); err != nil {
		return err
	}
	fmt.Fprintln(out, done)
	return nil
}

func table(out io.Writer, head string, fill func(line func(...any))) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, head)
	fill(func(cells ...any) {
		for _, c := range cells {
			fmt.Fprintf(w, "%v\t", c)
		}
		fmt.Fprintln(w)
	})
	return w.Flush()
}

// day shows a moment to the minute, "-" for none.
func day(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Format("2006-01-02 15:04")
}
